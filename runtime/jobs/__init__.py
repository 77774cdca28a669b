"""Jobs on a Ray cluster: what is sent there, and the wait for their end."""
