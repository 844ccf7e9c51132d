"""This machine: its names, memory, programs, sockets and power."""
