"""The agent on every Docker host: source and target machines, effects, one adapter per tool."""
