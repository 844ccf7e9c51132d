"""The process in front: takes requests in and holds them until the worker has answered."""
