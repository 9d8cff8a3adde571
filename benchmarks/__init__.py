"""What the shuffle costs, beside what moving the same bytes costs.  See README.md here."""
