"""The fleet on which schedulers are compared, and the lawless schedulers beside ours."""
