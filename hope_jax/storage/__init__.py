"""What lies on the disk: digests, sealed files, files of tensors, locks; and traced programs."""
