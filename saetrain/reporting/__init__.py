"""What runs say of themselves: one page for people, and a picture."""
