"""The bus: event schema, keyspace, stores, folding. Imports nothing of coordinator or hostd."""
