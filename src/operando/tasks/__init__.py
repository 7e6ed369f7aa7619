"""What is asked, and who says it is right."""
