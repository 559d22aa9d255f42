"""Where requests enter: the FastAPI application, its edge middleware, and the RunPod surface."""
