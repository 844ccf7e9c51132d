"""What made the vectors in Immich's index, and whether this start would make others."""
