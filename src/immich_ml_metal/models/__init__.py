"""Model files: found on disk, fetched, checked, moved. The way in is `store`."""
