"""Model families, the picture engine and LoRA files. Plain torch: no Ray, no HTTP, no object storage."""
