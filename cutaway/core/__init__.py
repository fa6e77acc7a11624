"""The words of the house: sites, addresses, results, methods, statistics, refusals, records, files."""
