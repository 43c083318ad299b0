"""A real federation: keys and files for every site, the exact commands, and a trial of it all on one machine."""
