"""Alembic runs this: our tables, on the connection that `database` holds."""

from alembic import context

from cluster.registry.tables import Table

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Table.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    compare_type=True,
)
context.run_migrations()
