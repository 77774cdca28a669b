"""From what a user hands in to requests: the validator, the tokenizer, grammars before they reach a shard."""
