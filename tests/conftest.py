"""Makes `playbook`, the in-memory fleet, importable from every test."""
