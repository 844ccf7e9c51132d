"""Apple Vision: faces and text."""
