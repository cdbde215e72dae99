"""The console command, and errors as the command line shows them."""
