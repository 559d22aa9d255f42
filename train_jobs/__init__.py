"""LoRA training as a Ray job: the request's spec, the dataset, the loop, the Ray Train worker and the driver."""
