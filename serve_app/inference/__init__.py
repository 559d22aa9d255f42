"""The replica that makes pictures: models, adapters, engine, stored results."""
