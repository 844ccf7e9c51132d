"""The child process: it owns the models and answers what the gateway hands on."""
