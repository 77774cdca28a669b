"""The engine: requests, who computes how much in each step, and the loop that has it computed."""
