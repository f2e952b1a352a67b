"""Programs that run inside the containers of tests/e2e/test_real_software.py; nothing of them is imported."""
