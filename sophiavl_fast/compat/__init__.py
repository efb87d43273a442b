"""What the engines need on machines without CUDA. Every piece here is a no-op where CUDA is present."""
