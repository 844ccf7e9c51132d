"""The Immich server as we may see and steer it: its settings, its queues, its missing jobs."""
