"""What lies on the disk: digests, sealed files and folders, used by checkpoints and contexts alike."""
