"""Reading what `saetrain features` wrote: a latent, its examples and their text, and a card for notebooks."""
