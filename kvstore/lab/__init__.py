"""The laboratory: programs that show and measure the store. Only the command line imports it."""
