"""The operator library for ONNX Runtime: its sources in C++, building it, and registering it with a session."""
