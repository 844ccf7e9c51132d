"""The process in front: takes requests in and holds them until the engine has answered."""
