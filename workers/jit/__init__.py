"""What compiled CPU code is made with, and where it is kept."""
