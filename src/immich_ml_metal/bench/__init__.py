"""What `bench` measures and prints."""
