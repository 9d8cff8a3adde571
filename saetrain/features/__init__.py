"""What each latent of a dictionary does on a store of activations: one read of the rows, every latent at once.

::

    store in document order
      | encode    (block of rows) x (shard of latents)     codes, grouped by latent
      | select    block of rows, where k latents of each token compete over several shards
      | survey    where documents begin, and the rows among which quiet ones are looked for
      v
    collate       chunk of latents                         all activations of a latent, together in row order
    draw, pairs   block of rows, then chunk of latents     latents that are active together, on a sample of rows
    product       chunk of latents                         neighbours and logits, from the weights alone
      v
    OUT/          statistics, examples and contexts of every latent, as Zarr arrays of plain bytes

Each line is a step of `actshuffle.jobs`: tasks may run anywhere, in any order, twice, and after a kill, and write the
same bytes.  docs/features.md defines every array.
"""
