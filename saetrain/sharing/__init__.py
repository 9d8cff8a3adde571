"""What `saetrain features` found, in the files of other people's pages and tools."""
