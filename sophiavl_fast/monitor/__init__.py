"""What people look at: metrics and samples on disk, progress in the terminal, the report page, the doctor's table."""
