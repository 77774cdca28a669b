"""What ``headwise bench`` measures."""
