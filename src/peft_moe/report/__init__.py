"""What an adapter is and what its routers do, as plain numbers, tables, pictures and a page."""
