"""What people look at: panels, and the sinks they go to."""
