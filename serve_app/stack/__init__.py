"""One local instance: the embedded S3 server, Ray and the Serve application under one supervisor process."""
