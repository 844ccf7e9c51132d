"""Asking a service as Immich does, and the pictures to ask about."""
