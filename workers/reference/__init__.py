"""The model in plain torch, for every device and dtype: slow, plain, and what the others are tested against."""
