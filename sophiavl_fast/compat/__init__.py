"""What the engines need of the process that holds them, most of it on machines without CUDA, where alone it does anything."""
