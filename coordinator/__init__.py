"""The server: admission, lifecycle, policy, election, and cargoctl."""
