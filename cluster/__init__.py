"""Places groups of shards, carries their step messages, notices their deaths. The only folder that imports Ray."""
