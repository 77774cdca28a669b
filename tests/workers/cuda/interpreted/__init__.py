"""Tests that need Triton's interpreter; see test_interpreter.py one folder up."""
