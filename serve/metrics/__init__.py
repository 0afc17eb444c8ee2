"""What a serving engine tells about itself: Prometheus, TensorBoard, a Grafana dashboard, the access log."""
