"""Start at boot, restart after a crash, stop: through launchd on macOS, systemd on Linux."""
