"""What is wrong with this installation, its cause first, each with a fix."""
