"""The laboratory: programs that show and measure the store with real models. Nothing else imports it but the command line."""
