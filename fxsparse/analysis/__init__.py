"""Facts by running the network on its own taint, and the smallest layout that the facts allow."""
