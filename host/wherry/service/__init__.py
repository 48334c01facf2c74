"""The background process that owns one machine, and what starts and describes it."""

SERVICE_ARGUMENT = "--service"
"""What makes the frozen program run as a service."""
