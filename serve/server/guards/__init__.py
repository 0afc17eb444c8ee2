"""What stands between the network and the server: limits of connections and bodies, keys, hosts, request ids."""
